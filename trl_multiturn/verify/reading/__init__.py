"""What an answer says: a text in one notation, then numbers, quantities, times, lists, words. Knows the texts only."""
