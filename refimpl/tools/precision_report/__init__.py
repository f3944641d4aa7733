"""The precision page: what every cast of a training run did."""
