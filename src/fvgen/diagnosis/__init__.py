"""What a run's numbers say went wrong: `diagnose` a folder."""

from fvgen.diagnosis.diagnose import Diagnosis, Finding, diagnose, text_of

__all__ = ["Diagnosis", "Finding", "diagnose", "text_of"]
