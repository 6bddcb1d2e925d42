"""The small trained models in the package: how they are made, scored and shown. All live in `zs3fast.data.world`."""
