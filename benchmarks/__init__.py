"""What gradlab's gradients cost and are worth, beside other libraries and hand-written torch."""
