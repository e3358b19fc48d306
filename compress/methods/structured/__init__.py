"""Methods that leave an ordinary smaller model: narrower MLPs, fewer heads, experts or blocks."""
