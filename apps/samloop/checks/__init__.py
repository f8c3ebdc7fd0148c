"""What `samloop doctor` looks at. Each look is a function of a `Subject` and changes nothing."""
