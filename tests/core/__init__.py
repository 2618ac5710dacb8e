"""The pure core, by tables and Hypothesis: no asyncio, no fixtures, seconds in all."""
