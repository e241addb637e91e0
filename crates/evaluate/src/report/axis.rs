//! The range of an axis and its ticks.

/// A linear or logarithmic axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Axis {
    from: f64,
    to: f64,
    pub(super) is_log: bool,
}

/// The ratio of the largest to the smallest value above which an axis is logarithmic.
const LOG_FROM: f64 = 30.0;
/// The largest magnitude on an axis; magnitudes below its inverse count as 0.
const LARGEST: f64 = 1e100;

impl Axis {
    /// An axis that shows the values with some room on both sides.
    ///
    /// Values that are not finite or too large are ignored.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let known = values.filter(|value| value.abs() <= LARGEST);
        let known = known.map(|value| {
            if value.abs() < 1.0 / LARGEST {
                0.0
            } else {
                value
            }
        });
        let none = (f64::INFINITY, f64::NEG_INFINITY);
        let (least, most) = known.fold(none, |(least, most), value| {
            (least.min(value), most.max(value))
        });
        if least > most {
            return Self::linear(0.0, 1.0);
        }
        if least > 0.0 && most / least > LOG_FROM {
            let room = (most / least).powf(0.06);
            return Self {
                from: least / room,
                to: most * room,
                is_log: true,
            };
        }
        let (middle, half) = ((least + most) / 2.0, (most - least) / 2.0);
        let half = if least != most {
            (half * 1.12).max(middle.abs() * 1e-6)
        } else if middle != 0.0 {
            middle.abs() * 0.1
        } else {
            0.5
        };
        let from = middle - half;
        // An axis of values that are not negative begins at 0 or above.
        let from = if least >= 0.0 { from.max(0.0) } else { from };
        Self::linear(from, middle + half)
    }

    fn linear(from: f64, to: f64) -> Self {
        Self {
            from,
            to,
            is_log: false,
        }
    }

    /// The position of a value, from 0 at the left to 1 at the right, clamped to the axis.
    pub(super) fn place(&self, value: f64) -> f64 {
        let place = if self.is_log {
            (value / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        place.clamp(0.0, 1.0)
    }

    /// The values and labels of about `n` ticks, from left to right.
    pub(super) fn ticks(&self, n: usize) -> Vec<(f64, String)> {
        if self.is_log {
            self.powers(n)
        } else {
            self.steps(n)
        }
    }

    fn steps(&self, n: usize) -> Vec<(f64, String)> {
        let least = (self.to - self.from) / n.max(1) as f64;
        let power = least.log10().floor() as i32;
        let factor = least / 10f64.powi(power);
        let (factor, power) = match [1.0, 2.0, 5.0]
            .into_iter()
            .find(|&nice| factor <= nice + 1e-9)
        {
            Some(nice) => (nice, power),
            None => (1.0, power + 1),
        };
        let step = factor * 10f64.powi(power);
        let decimals = (-power).max(0) as usize;
        let (first, last) = ((self.from / step).ceil(), (self.to / step).floor());
        let labelled = |at: usize| {
            // Adding 0 turns -0, which prints its sign, into 0.
            let value = (first + at as f64) * step + 0.0;
            let label = if value != 0.0 && (value.abs() >= 1e6 || decimals > 6) {
                format!("{value:.2e}")
            } else {
                format!("{value:.*}", decimals.min(6))
            };
            (value, label)
        };
        let count = (last - first + 1.0).clamp(0.0, n as f64 + 1.0) as usize;
        (0..count).map(labelled).collect()
    }

    fn powers(&self, n: usize) -> Vec<(f64, String)> {
        let (low, high) = (
            self.from.log10().floor() as i32,
            self.to.log10().ceil() as i32,
        );
        let of = |factors: &[f64]| -> Vec<f64> {
            let values = (low..=high).flat_map(|power| {
                let factors = factors.iter();
                factors.map(move |factor| factor * 10f64.powi(power))
            });
            values
                .filter(|value| (self.from..=self.to).contains(value))
                .collect()
        };
        let candidates = [of(&[1.0, 2.0, 5.0]), of(&[1.0, 3.0]), of(&[1.0])];
        let few = candidates.iter().find(|values| values.len() <= n);
        let values = few.unwrap_or(&candidates[2]);
        let stride = values.len().div_ceil(n.max(1)).max(1);
        let labelled = |&value: &f64| {
            if !(1e-4..1e5).contains(&value) {
                return (value, format!("{value:.0e}"));
            }
            // The product of a digit and a power of ten may be off in its last bit.
            let decimals = (-value.log10().floor()).max(0.0) as usize;
            (value, format!("{value:.decimals$}"))
        };
        values.iter().step_by(stride).map(labelled).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        let labels = |values: &[f64], n| -> Vec<String> {
            let ticks = Axis::of(values.iter().copied()).ticks(n);
            ticks.into_iter().map(|(_, label)| label).collect()
        };
        assert_eq!(labels(&[5.38, 5.57], 5), ["5.40", "5.45", "5.50", "5.55"]);
        assert_eq!(labels(&[0.0, 1.0], 5), ["0.0", "0.5", "1.0"]);
        assert_eq!(
            labels(&[-1.5, 0.4], 5),
            ["-1.5", "-1.0", "-0.5", "0.0", "0.5"]
        );
        assert_eq!(labels(&[12000.0, 13000.0], 5), ["12000", "12500", "13000"]);
        assert_eq!(labels(&[5.0, 5000.0], 5), ["10", "100", "1000"]);
        assert_eq!(labels(&[5.0, 200.0], 5), ["10", "30", "100"]);
        assert_eq!(labels(&[1e-5, 1.0], 4), ["1e-5", "0.001", "0.1"]);
        assert_eq!(labels(&[3.0, 3.0], 5), ["2.8", "3.0", "3.2"]);
        assert_eq!(labels(&[], 5), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
    }

    proptest! {
        #[test]
        fn an_axis_takes_any_values(values in prop::collection::vec(any::<f64>(), 0..6), n in 0usize..9) {
            let axis = Axis::of(values.iter().copied());
            for &value in &values {
                let place = axis.place(value);
                prop_assert!(place.is_nan() || (0.0..=1.0).contains(&place));
                prop_assert!(value.abs() > 1e100 || value.is_nan() || !place.is_nan());
            }
            let ticks = axis.ticks(n);
            prop_assert!(ticks.len() <= n.max(1) + 1);
            prop_assert!(ticks.windows(2).all(|pair| pair[0].0 <= pair[1].0));
        }

        #[test]
        fn values_lie_on_their_axis_in_order(values in prop::collection::vec(-1e3..1e6, 2..6)) {
            let axis = Axis::of(values.iter().copied());
            for pair in values.windows(2) {
                let (a, b) = (axis.place(pair[0]), axis.place(pair[1]));
                prop_assert!(0.0 < a && a < 1.0 || pair[0] == 0.0);
                prop_assert_eq!(a < b, pair[0] < pair[1]);
            }
            let ticks = axis.ticks(5);
            prop_assert!((1..=6).contains(&ticks.len()));
            for (value, label) in ticks {
                let read: f64 = label.parse().unwrap();
                prop_assert!((read - value).abs() <= 1e-9 * value.abs().max(1.0), "{} {}", label, value);
            }
        }
    }
}
