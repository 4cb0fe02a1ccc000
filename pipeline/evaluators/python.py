"""A protocol that is not ours: `python:module:Class,key=value`, `python:FILE.py:Class,key=value`, or of a package."""

from compress_ssl.pipeline.evaluators.base import Evaluator
from compress_ssl.pipeline.evaluators.requirements import find_class_faults
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.user_object import UserObject


def protocol(user: UserObject) -> type[Evaluator]:
    """Your own protocol: a subclass of compress_ssl.pipeline.evaluators.base.Evaluator, from a module or a file.

    python:mine.py:Centroid,power=2 builds the class Centroid of mine.py with power=2. The keys are the fields of the
    dataclass. docs/protocols.md shows how to write and test a protocol. Raises UserError for a place without such a
    class.
    """
    found = user.require_subclass(Evaluator, "write one that returns a Result")  # type: ignore[type-abstract]
    fault = next(find_class_faults(found), None)
    if fault:
        raise UserError(f"{user.name} {fault}")
    return found
