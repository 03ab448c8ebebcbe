"""A schema, and a feed of four points for it."""

from forml import io
from forml.io import dsl, layout


class Points(dsl.Schema):
    """Points in the plane."""

    x = dsl.Field(dsl.Float())
    y = dsl.Field(dsl.Float())


POINTS = {"x": (1.0, 2.0, 3.0, 6.0), "y": (10.0, 20.0, 30.0, 40.0)}


def produce(statement, entry=None):
    """Return the columns that a statement asks for."""
    names = [feature.name for feature in statement.features]
    return layout.Dense.from_rows(list(zip(*(POINTS[name] for name in names), strict=True)))


class Feed(io.Feed, alias="demo"):
    """Feeds the points."""

    @classmethod
    def producer(cls, sources, features, **options):
        """Return what produces data."""
        return produce

    @property
    def sources(self):
        """All that there is."""
        return {Points: None}
