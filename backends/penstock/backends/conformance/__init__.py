"""What every backend must do, as checks that ship with the package. `suite` says how to run them."""

from penstock.backends.conformance.subject import NotApplicable, Subject
from penstock.backends.conformance.suite import CHECKS, subjects

__all__ = ["CHECKS", "NotApplicable", "Subject", "subjects"]
