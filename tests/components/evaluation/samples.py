"""What an evaluation measured, in part: the numbers that the report and the model card both speak about."""

from __future__ import annotations

from typing import Any

MEASURED: dict[str, Any] = {
    "scored": {"rows": 40, "split_rows": 90, "tokens": 2560, "bytes_per_token": 3.0, "basis": "Basis."},
    "scores": {
        "model": {"loss": 3.0, "standard_error": 0.1, "perplexity": 20.1, "bits_per_byte": 1.44},
        "bigram": {"loss": 4.0, "standard_error": 0.1, "perplexity": 54.6, "bits_per_byte": 1.92},
        "unigram": {"loss": 5.0, "standard_error": 0.1, "perplexity": 148.4, "bits_per_byte": 2.40},
        "uniform": {"loss": 6.0, "perplexity": 403.4, "bits_per_byte": 2.89},
    },
    "comparison": {
        "bigram": {"difference": -1.0, "standard_error": 0.05},
        "unigram": {"difference": -2.0, "standard_error": 0.05},
    },
}
