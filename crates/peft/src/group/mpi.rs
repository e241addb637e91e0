use std::cell::Cell;
use std::{fmt, mem, thread};

use ::mpi::Threading;
use ::mpi::collective::SystemOperation;
use ::mpi::environment::Universe;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, CommunicatorCollectives};

use super::Group;
use crate::{Error, Result};

/// The values that are summed in one call, whose number MPI counts in 32 bits.
const PART: usize = 1 << 24;

/// A process of those that `mpirun` started, on one machine or on several.
///
/// A process that [leaves](Group::leave) or panics does not say farewell to MPI, and `mpirun` ends the
/// others when it exits.
pub struct Mpi {
    world: SimpleCommunicator,
    /// MPI's farewell, which waits for that of the others.
    universe: Cell<Option<Universe>>,
}

impl Mpi {
    /// Joins the processes. A program that `mpirun` did not start is alone.
    ///
    /// # Errors
    /// [`Error::Group`] if this process has joined them before, or the library cannot be called from
    /// several threads in turn.
    pub fn join() -> Result<Self> {
        let problem = |problem: &str| Error::Group {
            problem: problem.into(),
        };
        let joined = ::mpi::initialize_with_threading(Threading::Serialized);
        let (universe, threading) =
            joined.ok_or_else(|| problem("this process has joined MPI before"))?;
        if threading < Threading::Serialized {
            return Err(problem(
                "this MPI library cannot be called from several threads in turn",
            ));
        }
        Ok(Self {
            world: universe.world(),
            universe: Cell::new(Some(universe)),
        })
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} of {}", self.rank(), self.size())
    }
}

impl Group for Mpi {
    fn rank(&self) -> usize {
        // A rank in the world is not negative.
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        let own = values.to_vec();
        for (own, sums) in own.chunks(PART).zip(values.chunks_mut(PART)) {
            self.world
                .all_reduce_into(own, sums, SystemOperation::sum());
        }
        Ok(())
    }

    fn leave(&self) {
        mem::forget(self.universe.take());
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if thread::panicking() {
            self.leave();
        }
    }
}
