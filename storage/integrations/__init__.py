"""Other programs that this library serves, each by a module that only its host imports."""
