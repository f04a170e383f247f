"""The ledger of a bulk job: rows, names of outputs, the lease, verification and the report."""
