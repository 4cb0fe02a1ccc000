"""HTML pages and figures of finished evaluations: `evaluation.write_report` for one, `comparison.compare` for many."""
