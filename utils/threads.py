"""Have threads that wait for work sleep; import this before torch.

Otherwise OpenMP's threads spin while they wait, for 0.2 seconds or so. Beside another program each
of their meetings then waits for the other program's threads: a k-means of 0.12 s took up to 4 s.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
