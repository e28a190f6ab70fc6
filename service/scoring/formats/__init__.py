"""What files of rows may be: each format on a page of its own."""
