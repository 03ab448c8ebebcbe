"""The real ForML keeps packages, states and applications by this library, on real servers."""
