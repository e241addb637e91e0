//! The sizes of values, and what is charged for what is made of them before it is made.

use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};

use super::text::{View, has_exponent, text};

/// The deepest nesting of values. A record's JSON nests at most 128 levels deep.
const MAX_DEPTH: usize = 150;

/// What a value costs apart from its text, in bytes.
pub(super) const VALUE_BYTES: u64 = 32;

/// The bytes that a step pays for, as in minijinja.
const STEP_BYTES: u64 = 64;

/// The part of the bytes of a rendering that a value, or the result of a filter, may take: to make it,
/// and to make another of it, takes several copies, such as the characters of a string.
const SHARE: u64 = 16;

/// The most characters that are stripped. Each character of a text is compared with all of them.
const MAX_STRIPPED: usize = 256;

/// Adds the filters that [`super::guard`] inserts.
pub(super) fn add_to(jinja: &mut Environment) {
    let named = |name: &'static str| name.trim_matches(['|', ' ']);
    jinja.add_filter(named(super::VALUE), |state: &State, value: &Value| {
        refuse_namespace(value)?;
        checked(state, value)
    });
    jinja.add_filter(named(super::HELD), checked);
    jinja.add_filter(named(super::SCALAR), |state: &State, value: &Value| {
        if value.as_object().is_some() {
            return Err(invalid("only strings and numbers are multiplied"));
        }
        checked(state, value)
    });
    jinja.add_filter(named(super::TEXT), |state: &State, value: &Value| {
        refuse_namespace(value)?;
        let value = checked(state, value)?;
        // Refused where it is used, with its name.
        if value.is_undefined() && state.undefined_behavior() == UndefinedBehavior::Strict {
            return Ok(value);
        }
        Ok::<_, Error>(Value::from(&*text(&value)?))
    });
}

pub(super) fn invalid(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.into())
}

/// The size of a value, in which shared parts count as often as they occur.
#[derive(Clone, Copy, Default)]
pub(super) struct Size {
    /// The bytes of its texts, and [`VALUE_BYTES`] for each value in it.
    pub(super) n_bytes: u64,
    pub(super) n_values: u64,
    pub(super) depth: usize,
}

impl Size {
    /// Measures a value of at most `max` bytes.
    pub(super) fn of(value: &Value, max: u64) -> Result<Self, Error> {
        let mut size = Self::default();
        size.add(value, 0, max)?;
        Ok(size)
    }

    fn add(&mut self, value: &Value, depth: usize, max: u64) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            let problem = format!("a value nests more than {MAX_DEPTH} levels deep");
            return Err(Error::new(ErrorKind::OutOfFuel, problem));
        }
        let text = value.as_bytes().map_or(0, <[u8]>::len);
        self.n_values += 1;
        self.n_bytes = self.n_bytes.saturating_add(VALUE_BYTES + text as u64);
        self.depth = self.depth.max(depth);
        if self.n_bytes > max {
            return Err(too_large(max));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()?.checked() {
                    let item = item?;
                    refuse_namespace(&item)?;
                    self.add(&item, depth + 1, max)?;
                }
            }
            ValueKind::Map => {
                let pairs = value.as_object().and_then(|map| map.try_iter_pairs());
                for (key, value) in pairs.into_iter().flatten() {
                    refuse_namespace(&value)?;
                    self.add(&key, depth + 1, max)?;
                    self.add(&value, depth + 1, max)?;
                }
            }
            _ => (),
        }
        Ok(())
    }
}

/// Refuses namespaces and loops, which can hold themselves if a value can hold them.
///
/// Such a value would have no end, and would not be freed.
fn refuse_namespace(value: &Value) -> Result<(), Error> {
    // By their names: the types are private, and that of a plain map depends on the engine's features.
    let is_self_holding = value.as_object().is_some_and(|object| {
        let name = object.type_name();
        name.ends_with("::Namespace") || name.ends_with("::Loop")
    });
    if is_self_holding {
        return Err(invalid(
            "a namespace or a loop is no value: use its attributes",
        ));
    }
    Ok(())
}

/// Charges for a value before something is done with it.
///
/// An iterable becomes a list: one that is made of others would compute them again and again.
pub(super) fn checked(state: &State, value: &Value) -> Result<Value, Error> {
    let size = Size::of(value, max_bytes(state))?;
    // The engine charges for the text that a filter is given.
    if value.as_object().is_some() {
        charge(state, size.n_values * VALUE_BYTES + size.n_bytes / 8)?;
    }
    if value.kind() == ValueKind::Iterable && value.downcast_object_ref::<View>().is_none() {
        return value.try_iter()?.checked().collect::<Result<Value, _>>();
    }
    Ok(value.clone())
}

/// The bytes that a value may take.
pub(super) fn max_bytes(state: &State) -> u64 {
    let (n_done, n_left) = state.fuel_levels().unwrap_or_default();
    n_done.saturating_add(n_left).saturating_mul(STEP_BYTES) / SHARE
}

/// Charges for bytes before they are made.
pub(super) fn charge(state: &State, n_bytes: u64) -> Result<(), Error> {
    let max = max_bytes(state);
    if n_bytes > max {
        return Err(too_large(max));
    }
    state.consume_fuel(n_bytes / STEP_BYTES)
}

fn too_large(max: u64) -> Error {
    let problem = format!("a value has more than {max} bytes");
    Error::new(ErrorKind::OutOfFuel, problem)
}

/// Refuses more characters to strip than a text is compared with.
pub(super) fn charge_stripped(stripped: Option<&str>) -> Result<(), Error> {
    let n_stripped = stripped.map_or(0, |stripped| stripped.chars().count());
    if n_stripped > MAX_STRIPPED {
        let problem = format!("{n_stripped} characters to strip, more than {MAX_STRIPPED}");
        return Err(Error::new(ErrorKind::OutOfFuel, problem));
    }
    Ok(())
}

/// Charges for the longest text that a format can make: with all arguments in each field, and the
/// widths and precisions.
pub(super) fn charge_format(state: &State, text: &str, args: &[Value]) -> Result<(), Error> {
    let n_fields = text.matches(['{', '%']).count() as u64;
    let mut n_bytes = 0u64;
    for arg in args {
        n_bytes = n_bytes.saturating_add(Size::of(arg, max_bytes(state))?.n_bytes);
    }
    let numbers = text.split(|char: char| !char.is_ascii_digit());
    let widths = numbers.filter(|number| !number.is_empty());
    // A number that does not fit is refused by the formatter.
    let widths = widths.map(|width| width.parse().unwrap_or(0u64));
    let widths = widths.fold(0u64, u64::saturating_add);
    if args.iter().any(has_exponent) {
        return Err(invalid(
            "a format of a number that is printed with an exponent is not supported",
        ));
    }
    let n_bytes = n_bytes.saturating_mul(n_fields).saturating_add(widths);
    charge(state, n_bytes)
}
