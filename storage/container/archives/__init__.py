"""Archives: a folder as one file, and back, safely."""
