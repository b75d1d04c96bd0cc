"""From scores to labels: label sets, thresholds, metrics, calibration and output columns."""
