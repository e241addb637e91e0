//! Trainings of one model by several processes or devices.

use std::fmt;

use burn::tensor::Tensor;

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
/// batches are dealt out in turn, and the gradients of what trains are summed over the members.
pub trait Group: fmt::Debug {
    /// This member, from 0.
    fn rank(&self) -> usize;

    /// The number of members.
    fn size(&self) -> usize;

    /// The sums of the values of all members, `F32` and of one length, on the device of this one's. All
    /// members call it as often, and all get the same bits.
    ///
    /// # Errors
    /// [`Error::Group`](crate::Error::Group) if a member has ended.
    fn sum(&self, values: Tensor<1>) -> Result<Tensor<1>>;
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

    fn sum(&self, values: Tensor<1>) -> Result<Tensor<1>> {
        Ok(values)
    }
}
