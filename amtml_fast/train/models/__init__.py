"""Networks: how they are made, what is caught inside them, how they are compiled and measured."""
