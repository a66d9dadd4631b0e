"""Draw many images, and compare what drew them."""
