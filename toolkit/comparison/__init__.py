"""Many runs, one table, one decision."""
