//! Kernels in CUDA C++.
//!
//! CubeCL's own language has no matrix instructions whose fragments a kernel can address. These kernels
//! have, and run in the queue of CubeCL's like any other: NVRTC compiles a program when it is first launched,
//! and the result is kept as those of CubeCL's kernels are. A program includes no header. Its shared memory is
//! static, of at most 48 KiB, because CubeCL gives a program that it did not make no other.

use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::{ElemType, UIntKind, attributes::BufferIOAttr, metadata::Info};
use cubecl::prelude::*;
use cubecl::server::{KernelArguments, MetadataBindingInfo};
use cubecl::{CubeKernel, PrecompiledSource};

/// The instructions that the programs share.
const PRELUDE: &str = include_str!("cuda/prelude.cu");

/// A program with one kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Program {
    /// The name of the kernel.
    pub(crate) kernel: &'static str,
    /// The text, which follows that of the shared instructions.
    pub(crate) source: &'static str,
    /// The macros that choose a variant of it.
    pub(crate) macros: Vec<(&'static str, usize)>,
    /// The number of threads of a block.
    pub(crate) threads: u32,
}

/// The numbers that a kernel is launched with: a structure of fields of 4 bytes.
#[derive(Default)]
pub(crate) struct Numbers(Vec<u32>);

impl Numbers {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a size.
    ///
    /// # Panics
    /// If it has more than 32 bits, which [`fits`] excludes.
    pub(crate) fn size(mut self, size: usize) -> Self {
        self.0.push(u32::try_from(size).expect("a size of 32 bits"));
        self
    }

    pub(crate) fn float(mut self, value: f32) -> Self {
        self.0.push(value.to_bits());
        self
    }

    /// The structure in words of 8 bytes, in the order of bytes of the device, which is little-endian.
    fn words(&self) -> Vec<u64> {
        let word = |pair: &[u32]| {
            let high = pair.get(1).copied().unwrap_or(0);
            u64::from(pair[0]) | u64::from(high) << 32
        };
        self.0.chunks(2).map(word).collect()
    }
}

/// Whether a tensor is on a device that runs the programs, of compute capability 8.0 or more, and the sizes
/// and strides of its elements have 32 bits.
pub(crate) fn fits(tensor: &CubeTensor) -> bool {
    let sizes = tensor
        .meta
        .shape()
        .iter()
        .chain(tensor.meta.strides().iter());
    // The asynchronous copies came with that compute capability.
    tensor.client.name() == "cuda"
        && tensor.client.features().copy_async
        && sizes.into_iter().all(|&size| u32::try_from(size).is_ok())
}

/// Whether the first element lies at a multiple of 16 bytes, and so does that of each row.
///
/// Allocations begin at larger multiples.
pub(crate) fn is_aligned(tensor: &CubeTensor, row_stride: usize) -> bool {
    let offset = tensor.handle.offset_start.unwrap_or(0);
    offset.is_multiple_of(16) && (row_stride * tensor.dtype.size()).is_multiple_of(16)
}

/// The number of multiprocessors of a tensor's device.
pub(crate) fn multiprocessors(tensor: &CubeTensor) -> usize {
    let properties = tensor.client.properties();
    properties
        .hardware
        .num_streaming_multiprocessors
        .map_or(64, |n| n as usize)
}

impl Program {
    /// Launches the kernel on a grid of blocks, with pointers to what it reads, pointers to what it writes,
    /// and numbers.
    ///
    /// # Safety
    /// The kernel accesses the tensors within their sizes.
    pub(crate) unsafe fn launch(
        self,
        grid: [usize; 3],
        reads: &[&CubeTensor],
        writes: &[&CubeTensor],
        numbers: Numbers,
    ) {
        let data = numbers.words();
        // All are a parameter of the kernel, and none are metadata in a buffer.
        let info = MetadataBindingInfo {
            dynamic_metadata_offset: data.len(),
            data,
        };
        let mut arguments = KernelArguments::new().with_info(info);
        // If the kernel is not launched, what it would have written is lost, and not what it reads.
        let access = [
            (reads, BufferIOAttr::ReadOnly),
            (writes, BufferIOAttr::WriteOnly),
        ];
        for (tensors, access) in access {
            for tensor in tensors {
                arguments = arguments.with_buffer_io(tensor.handle.clone().binding(), access);
            }
        }
        let [x, y, z] = grid.map(|n| u32::try_from(n).expect("a grid of 32 bits"));
        let client = writes[0].client.clone();
        client.launch(Box::new(self), CubeCount::Static(x, y, z), arguments);
    }

    fn dim(&self) -> CubeDim {
        CubeDim::new_1d(self.threads)
    }
}

impl KernelMetadata for Program {
    fn name(&self) -> &'static str {
        self.kernel
    }

    fn id(&self) -> KernelId {
        let mut id = KernelId::new::<Self>().info((self.kernel, self.macros.clone()));
        id.cube_dim = self.dim().into();
        id
    }

    fn address_type(&self) -> ElemType {
        UIntKind::U32.into()
    }
}

impl CubeKernel for Program {
    fn define(&self) -> KernelDefinition {
        let settings = KernelSettings::new(
            self.dim().into(),
            ExecutionMode::Unchecked,
            AddressType::U32,
        );
        KernelDefinition {
            body: Scope::root(settings.clone()),
            info: Info::default(),
            settings,
        }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        let macros = self.macros.iter();
        let macros: String = macros
            .map(|(name, value)| format!("#define {name} {value}\n"))
            .collect();
        Some(PrecompiledSource {
            source: [&macros, PRELUDE, self.source].concat(),
            entrypoint_name: self.kernel.into(),
            lang: "cuda",
        })
    }
}
