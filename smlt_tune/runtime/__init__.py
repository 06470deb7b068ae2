"""What runs inside a function. Lean: knows no platform and never imports the backend."""
