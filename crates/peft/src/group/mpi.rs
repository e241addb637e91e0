use std::fmt;

use burn::tensor::{DType, Tensor, TensorData};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

use super::Group;
use crate::{Error, Result};

/// The values that are summed in one call, whose number MPI counts in 32 bits.
const PART: usize = 1 << 24;

/// A process of those that `mpirun` started, on one machine or on several.
///
/// Sums go through the memory of the host. If a process ends without dropping this, `mpirun` ends the
/// others.
pub struct Mpi {
    world: SimpleCommunicator,
    _universe: Universe,
}

impl Mpi {
    /// Joins the processes. A program that `mpirun` did not start is alone.
    ///
    /// # Errors
    /// [`Error::Group`] if this process has joined them before.
    pub fn join() -> Result<Self> {
        let joined = mpi::initialize_with_threading(Threading::Serialized);
        let (universe, _) = joined.ok_or_else(|| Error::Group {
            problem: "this process has joined MPI before".into(),
        })?;
        Ok(Self {
            world: universe.world(),
            _universe: universe,
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

    fn sum(&self, values: Tensor<1>) -> Result<Tensor<1>> {
        let (device, [n]) = (values.device(), values.dims());
        let values = values.into_data().convert::<f32>();
        let values = values.try_into_vec::<f32>().expect("converted to f32");
        let mut sums = vec![0.0f32; n];
        for (part, sums) in values.chunks(PART).zip(sums.chunks_mut(PART)) {
            self.world
                .all_reduce_into(part, sums, SystemOperation::sum());
        }
        let sums = TensorData::new(sums, [n]);
        Ok(Tensor::from_data(sums, (&device, DType::F32)))
    }
}
