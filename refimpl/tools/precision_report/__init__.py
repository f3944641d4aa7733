"""The precision report: what every cast of a training run did."""
