"""What every backend must do, as checks that ship with the package. `suite` says how to run them."""

from penstock.backends.conformance.across import PAIR_CHECKS, Pair
from penstock.backends.conformance.runner import Outcome, Result, run
from penstock.backends.conformance.subject import NotApplicable, Subject
from penstock.backends.conformance.suite import CHECKS, make_subject, subjects

__all__ = ["CHECKS", "PAIR_CHECKS", "NotApplicable", "Outcome", "Pair", "Result", "Subject", "make_subject", "run", "subjects"]
