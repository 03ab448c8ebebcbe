"""Where the project's data come from."""

import forml_demo_data as data
from forml import project

project.setup(project.Source.query(data.Points.select(data.Points.x), data.Points.y))
