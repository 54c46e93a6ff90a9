"""From records to batches, on the CPU, before any model exists.

records -> interleave -> patching -> packing -> batch        (loader runs the chain)
Record     Document      lengths     rows       Batch
"""
