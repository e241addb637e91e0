use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Group;
use crate::{Error, Result};

/// A member of a group of threads of one process, each with a device of its own or all on the CPU.
///
/// Values are summed in the order of the members.
///
/// # Examples
/// ```
/// use peft::{Group, Threads};
///
/// let sums = std::thread::scope(|scope| {
///     let members = Threads::new(2).into_iter();
///     let threads: Vec<_> = members
///         .map(|member| {
///             scope.spawn(move || {
///                 let mut values = [member.rank() as f32 + 1.0];
///                 member.sum(&mut values).map(|()| values[0])
///             })
///         })
///         .collect();
///     let sums = threads.into_iter().map(|thread| thread.join().expect("no panic"));
///     sums.collect::<Result<Vec<f32>, _>>()
/// });
/// assert_eq!(sums?, [3.0, 3.0]);
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    round: Arc<Round>,
}

/// A sum over the members.
#[derive(Debug)]
struct Round {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What the members have given.
    parts: Vec<Option<Vec<f32>>>,
    /// The sums, once all have given theirs, until all have taken them.
    sums: Option<Arc<Vec<f32>>>,
    n_taken: usize,
    has_left: bool,
}

impl Threads {
    /// The members of a group of this size.
    pub fn new(size: usize) -> Vec<Self> {
        let round = Arc::new(Round {
            state: Mutex::new(State {
                parts: vec![None; size],
                sums: None,
                n_taken: 0,
                has_left: false,
            }),
            changed: Condvar::new(),
        });
        let member = |rank| Self {
            rank,
            round: round.clone(),
        };
        (0..size).map(member).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A member that panics has left, and says so itself.
        let state = self.round.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something is so.
    ///
    /// # Errors
    /// [`Error::Group`] if a member has left before it is.
    fn until(&self, is_so: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while !is_so(&state) {
            if state.has_left {
                let problem = "a member has left before the others".into();
                return Err(Error::Group { problem });
            }
            let changed = self.round.changed.wait(state);
            state = changed.unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state)
    }
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.lock().parts.len()
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        let mut state = self.until(|state| state.sums.is_none())?;
        state.parts[self.rank] = Some(values.to_vec());
        if state.parts.iter().all(Option::is_some) {
            let mut parts = state.parts.iter_mut().filter_map(Option::take);
            let mut sums = parts.next().unwrap_or_default();
            for part in parts {
                if part.len() != sums.len() {
                    // Each member finds that it is not its number.
                    sums.clear();
                    break;
                }
                for (sum, value) in sums.iter_mut().zip(part) {
                    *sum += value;
                }
            }
            state.parts.fill(None);
            state.sums = Some(Arc::new(sums));
            self.round.changed.notify_all();
        }
        drop(state);
        let mut state = self.until(|state| state.sums.is_some())?;
        let sums = state.sums.clone().unwrap_or_default();
        state.n_taken += 1;
        if state.n_taken == state.parts.len() {
            state.n_taken = 0;
            state.sums = None;
            self.round.changed.notify_all();
        }
        drop(state);
        if sums.len() != values.len() {
            return Err(Error::Group {
                problem: "the members sum different numbers of values".into(),
            });
        }
        values.copy_from_slice(&sums);
        Ok(())
    }

    fn leave(&self) {
        self.lock().has_left = true;
        self.round.changed.notify_all();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.leave();
    }
}
