"""Measured beside a floor in the same run, never as timed tests: these machines are noisy, ratios are not."""
