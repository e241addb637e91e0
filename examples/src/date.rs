//! The date that chat templates read.

use clap::Args;
use jiff::ZonedDateTime;
use jiff::civil::{Date, DateTime};

/// The option of a program that gives the date.
#[derive(Args, Clone, Copy, Debug)]
pub struct DateArg {
    /// Date for chat templates that write it (`strftime_now`)
    #[arg(long, value_name = "YYYY-MM-DD")]
    date: Option<Date>,
}

impl DateArg {
    /// The beginning of the day that is given.
    pub fn given(self) -> Option<DateTime> {
        self.date.map(|date| date.at(0, 0, 0, 0))
    }

    /// The time that is given, or else now.
    pub fn or_now(self) -> DateTime {
        self.given()
            .unwrap_or_else(|| ZonedDateTime::now().datetime())
    }
}
