import sys
from pathlib import Path

# so that tests/tolerances.py is found also where this folder alone is run
sys.path.insert(0, str(Path(__file__).parents[1]))
