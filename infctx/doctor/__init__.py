"""What this machine can do: what is there, what is missing or broken, and what each would bring."""
