//! Numbers and names in readable form.

use crate::statistics::Estimate;

/// A number with `decimals`, or in scientific notation if it is very large or small.
pub(super) fn number(value: f64, decimals: usize) -> String {
    match value.abs() {
        size if size >= 1e7 && size.is_finite() => format!("{value:.3e}"),
        size if size > 0.0 && size < 1e-6 => format!("{value:.1e}"),
        _ => format!("{value:.decimals$}"),
    }
}

/// The largest number of decimals that estimates of one metric need.
///
/// An estimate needs four digits but at most three decimals, or as many decimals as give half of its
/// interval two digits.
pub(super) fn decimals<'a>(estimates: impl Iterator<Item = &'a Estimate>) -> usize {
    estimates.map(own_decimals).max().unwrap_or(0)
}

/// The value with `decimals`, but at most one more than it needs itself.
pub(super) fn value(estimate: &Estimate, decimals: usize) -> String {
    number(estimate.value, decimals.min(own_decimals(estimate) + 1))
}

/// The value as by [`value`], and its interval if it has one.
pub(super) fn with_interval(estimate: &Estimate, decimals: usize) -> String {
    let decimals = decimals.min(own_decimals(estimate) + 1);
    let value = number(estimate.value, decimals);
    if !has_interval(estimate) {
        return value;
    }
    let ends = [estimate.lower, estimate.upper].map(|end| number(end, decimals));
    format!("{value} [{}]", ends.join(", "))
}

pub(super) fn has_interval(estimate: &Estimate) -> bool {
    estimate.n > 1 && estimate.lower.is_finite() && estimate.upper.is_finite()
}

fn own_decimals(estimate: &Estimate) -> usize {
    let for_digits = |value: f64, digits: i32| {
        let known = value.is_finite() && value != 0.0;
        let magnitude = if known {
            value.abs().log10().floor() as i32
        } else {
            0
        };
        (digits - 1 - magnitude).clamp(0, 6) as usize
    };
    let half = (estimate.upper - estimate.lower) / 2.0;
    let of_value = for_digits(estimate.value, 4);
    if has_interval(estimate) && half > 0.0 {
        of_value.min(3).max(for_digits(half, 2))
    } else {
        of_value
    }
}

/// A name on one line, without characters that are invalid in XML or control a terminal.
pub(super) fn one_line(name: &str) -> String {
    let space = |c: char| if c.is_control() { ' ' } else { c };
    let known = name
        .chars()
        .filter(|c| !matches!(c, '\u{fffe}' | '\u{ffff}'));
    let line: String = known.map(space).collect();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The arrow that points in the better direction of a metric.
pub(super) fn arrow(lower_is_better: bool) -> char {
    if lower_is_better { '↓' } else { '↑' }
}

/// An upper estimate of the width of a text in an unknown font of `size` pixels.
pub(super) fn width(text: &str, size: f64) -> f64 {
    let part = |c: char| match c {
        'i' | 'j' | 'l' | 'I' | '.' | ',' | ':' | ';' | '|' | '\'' | '!' => 0.34,
        ' ' | 'f' | 'r' | 't' | '(' | ')' | '[' | ']' | '-' | '/' => 0.42,
        'm' | 'w' | 'M' | 'W' | '%' | '@' => 0.98,
        'A'..='Z' | '&' | '<' | '>' | '=' | '+' | '↓' | '↑' => 0.82,
        '\0'..='\u{24f}' => 0.64,
        _ => 1.0,
    };
    text.chars().map(part).sum::<f64>() * size
}

/// A text shortened in its middle to a width of about `room` pixels.
pub(super) fn shortened(text: &str, size: f64, room: f64) -> String {
    if width(text, size) <= room {
        return text.into();
    }
    let characters: Vec<char> = text.chars().collect();
    // Names of models differ at their ends as often as at their beginnings.
    let cut = |kept: usize| {
        let head: String = characters[..kept.div_ceil(2)].iter().collect();
        let tail: String = characters[characters.len() - kept / 2..].iter().collect();
        format!("{}…{}", head.trim_end(), tail.trim_start())
    };
    let fits = |&kept: &usize| width(&cut(kept), size) <= room;
    // No character is narrower than 0.3 of the size.
    let most = (room.max(0.0) / (size * 0.3)) as usize;
    let most = most.min(characters.len());
    cut((0..most).rev().find(fits).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(value: f64, lower: f64, upper: f64, n: usize) -> Estimate {
        Estimate {
            value,
            lower,
            upper,
            n,
        }
    }

    #[test]
    fn the_interval_sets_the_digits() {
        let show = |estimate| with_interval(&estimate, 6);
        let own = |estimate: Estimate| with_interval(&estimate, decimals([&estimate].into_iter()));
        assert_eq!(own(estimate(7.20144, 7.1, 7.3, 9)), "7.201 [7.100, 7.300]");
        assert_eq!(
            own(estimate(7.20144, 7.2011, 7.2018, 9)),
            "7.20144 [7.20110, 7.20180]"
        );
        assert_eq!(
            own(estimate(12345.6, 12000.0, 13000.0, 9)),
            "12346 [12000, 13000]"
        );
        assert_eq!(
            own(estimate(0.00012, 0.00011, 0.00013, 9)),
            "0.000120 [0.000110, 0.000130]"
        );
        assert_eq!(
            own(estimate(1.5e-9, 1e-9, 2e-9, 9)),
            "1.5e-9 [1.0e-9, 2.0e-9]"
        );
        assert_eq!(
            own(estimate(5e9, 4e9, 6e9, 9)),
            "5.000e9 [4.000e9, 6.000e9]"
        );
        // One item has no interval, several equal ones have.
        assert_eq!(own(estimate(7.20144, 7.20144, 7.20144, 1)), "7.201");
        assert_eq!(own(estimate(1.0, 1.0, 1.0, 50)), "1.000 [1.000, 1.000]");
        assert_eq!(own(estimate(f64::INFINITY, 1.0, f64::INFINITY, 50)), "inf");
        assert_eq!(own(estimate(f64::NAN, f64::NAN, f64::NAN, 50)), "NaN");
        // Decimals of another model add at most one digit.
        assert_eq!(
            show(estimate(12345.6, 12000.0, 13000.0, 9)),
            "12345.6 [12000.0, 13000.0]"
        );
    }

    #[test]
    fn long_names_keep_their_ends() {
        let name = "2 bits, groups of 32, QA-LoRA, rank 4";
        assert_eq!(shortened(name, 12.0, 1000.0), name);
        let short = shortened(name, 12.0, 120.0);
        assert!(
            short.starts_with("2 bits") && short.ends_with("rank 4"),
            "{short}"
        );
        assert!(width(&short, 12.0) <= 120.0);
        assert_eq!(shortened(name, 12.0, -5.0), "…");
    }
}
