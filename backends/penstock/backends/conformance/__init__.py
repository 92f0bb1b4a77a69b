"""What every backend must do, as checks that ship with the package; see `penstock.backends.conformance.suite`."""
