"""From records to batches, on the CPU, before any model exists.

    records -> interleave -> patching -> packing -> batch

``lanes`` runs the chain up to rows, in an order of its own for each row of the global batch;
``loader`` makes batches of their rows for each rank, in processes of ``workers``, and ``buffer``
brings a batch from there to the GPU in one piece.
"""
