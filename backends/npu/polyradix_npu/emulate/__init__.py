"""An Ascend device in host memory, under the vendor's real wheel: for tests of what is called, never of how it runs."""
