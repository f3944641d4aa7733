"""Number formats shown: what each makes of a number."""
