"""An application of ForML, for its inventory."""

from forml import application

application.setup(application.Generic("demo-application", application.Latest("demo-project")))
