"""Many runs over one engine."""
