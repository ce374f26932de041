"""How fast a backend's verbs are at serving shapes, as a share of what its device was seen to do in the same run.

Speed is reported and never judged. What is judged is that the outputs are still right after the timing.
"""
