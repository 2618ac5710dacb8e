"""The pure heart: values and functions of values.

The rule of this room: no I/O, no clock, no asyncio, no third party. Time comes in as a number,
the world comes in frozen, and the same world always gives the same answer.
"""
