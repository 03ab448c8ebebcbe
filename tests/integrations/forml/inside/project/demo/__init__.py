"""A project of ForML."""
