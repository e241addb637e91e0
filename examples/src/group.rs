//! The processes that train together.

use std::env;

use peft::{Alone, Group};

use crate::outcome::Result;

/// The variables in which `mpirun` tells the number of processes, of Open MPI and of MPICH.
const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// Joins the processes that `mpirun` started; a program that it did not start is alone. All but the first
/// process print nothing from then on but errors.
///
/// # Errors
/// If there are others, and the program was compiled without the feature `mpi`.
fn join() -> Result<Box<dyn Group>> {
    if !SIZES.iter().any(|name| env::var_os(name).is_some()) {
        return Ok(Box::new(Alone));
    }
    #[cfg(feature = "mpi")]
    {
        let group = peft::Mpi::join()?;
        if group.rank() > 0 {
            crate::console::silence();
        }
        Ok(Box::new(group))
    }
    #[cfg(not(feature = "mpi"))]
    Err("this program was compiled without the feature `mpi`: give --features mpi to cargo".into())
}

/// Runs a program as a member of the group, which goes on without it if it ends with an error.
///
/// # Errors
/// Those of `run`; if `mpirun` started the program, and it was compiled without the feature `mpi`.
pub fn among(run: impl FnOnce(&dyn Group) -> Result<()>) -> Result<()> {
    let group = join()?;
    let ended = run(&*group);
    if ended.is_err() {
        group.leave();
    }
    ended
}
