"""Every error and warning the library raises, and the message for a missing extra."""

__all__ = [
    "ConceptErasureError",
    "EditError",
    "ErasureWarning",
    "FormatError",
    "NotFittedError",
    "ShapeError",
    "SiteNotFoundError",
    "SpaceError",
    "missing_extra",
]


class ConceptErasureError(Exception):
    """Base of every error raised on purpose."""


class ShapeError(ConceptErasureError, ValueError):
    """Shapes disagree."""


class SpaceError(ConceptErasureError, ValueError):
    """An eraser was used in a space (model, site, token rule) it was not fitted in."""


class SiteNotFoundError(ConceptErasureError, LookupError):
    """A model has no such site."""


class NotFittedError(ConceptErasureError, RuntimeError):
    """A fitter was asked for an eraser before it saw enough data."""


class EditError(ConceptErasureError, RuntimeError):
    """An edit cannot be applied, folded or undone."""


class FormatError(ConceptErasureError, ValueError):
    """A file is not what it claims to be."""


class ErasureWarning(UserWarning):
    """The result is usable but does not meet the promise; the message gives the number."""


def missing_extra(package: str, extra: str) -> ImportError:
    """Return the error for an optional package that is not installed."""
    return ImportError(
        f"this needs the package {package!r}; install it with: pip install 'deconcept[{extra}]'"
    )
