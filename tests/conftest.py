"""Being here, this file puts the folder on sys.path, where tests/tolerances.py is found."""
