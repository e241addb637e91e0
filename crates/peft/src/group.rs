//! Trainings of one model by several processes or devices.

use std::fmt;

use crate::Result;

#[cfg(feature = "mpi")]
mod mpi;
mod threads;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use self::threads::Threads;

/// The members that train one model together, each on a part of the batches: data parallelism.
///
/// Each member has the whole model and runs [`fit_in`](crate::fit_in) with the same arguments. A step's
/// batches are dealt out in turn, and the gradients of what trains are summed over the members, in the memory
/// of the host.
pub trait Group: fmt::Debug {
    /// This member, from 0.
    fn rank(&self) -> usize;

    /// The number of members.
    fn size(&self) -> usize;

    /// Replaces values by the sums of those of all members, who call it as often and with as many values. All
    /// get the same bits.
    ///
    /// # Errors
    /// [`Error::Group`](crate::Error::Group) if a member has left, or sums another number of values.
    fn sum(&self, values: &mut [f32]) -> Result<()>;

    /// Ends the part of this member after an error, so that the others do not wait for it.
    fn leave(&self);
}

/// A training by one process on one device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn leave(&self) {}
}
