"""What the backends of object stores and of fsspec's schemes share: the two kinds of driver."""
