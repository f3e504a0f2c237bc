//! ACPI tables, enough for a stock kernel: CPUs, interrupt controllers, the PCI host bridge, the
//! serial line, the power button, reset and shutdown.
//!
//! Owns the tables' contents; where the registers are that they name is decided in
//! [`layout`] and [`power`](crate::legacy::power). The tables are a pure function of the number
//! of vCPUs.
//!
//! Facts: ACPI specification 6.5, chapters 5 (tables), 6.4 (resources), 19 (AML).

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::legacy::{power, rtc};
use crate::memory::layout;

const OEM_ID: [u8; 6] = *b"HLDFST";
const OEM_TABLE_ID: [u8; 8] = *b"HOLDFAST";
const OEM_REVISION: u32 = 1;

/// Legacy devices (serial line, timer) are there; no VGA; no keyboard controller.
const BOOT_ARCH: u16 = 0b101;
/// Interrupt source override: level triggered, active high.
const LEVEL_HIGH: u16 = 0b1101;

/// Bytes to be placed at [`layout::ACPI_START`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// The RSDP first, then the tables.
    pub bytes: Vec<u8>,
}

struct Placer {
    bytes: Vec<u8>,
}

impl Placer {
    /// Appends a table and says at which address it is.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = layout::ACPI_START + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// Bytes that are a table already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

/// The tables of a VM with `vcpus` vCPUs.
#[must_use]
pub fn tables(vcpus: u8) -> AcpiTables {
    let mut placer = Placer { bytes: vec![0; Rsdp::len()] };
    let dsdt = placer.place(&Raw(dsdt::dsdt(vcpus).as_slice()));
    let facs = placer.place(&Raw(&facs()));
    let fadt = placer.place(&fadt(dsdt, facs));
    let madt = placer.place(&Raw(madt(vcpus).as_slice()));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM_START, 0, 0, 0);
    let mcfg = placer.place(&mcfg);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for address in [fadt, madt, mcfg] {
        xsdt.add_entry(address);
    }
    let xsdt = placer.place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    let mut bytes = placer.bytes;
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    AcpiTables { bytes }
}

/// The firmware control structure: nothing but its name and length.
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 2;
    facs
}

fn fadt(dsdt: u64, facs: u64) -> impl Aml {
    let pm = u32::from(layout::PM_PORT);
    let low32 = |address: u64| u32::try_from(address).unwrap_or(0);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(low32(facs))
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = low32(dsdt).into();
    fadt.sci_int = u16::try_from(layout::SCI_GSI).unwrap_or(0).into();
    fadt.pm1a_evt_blk = pm.into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = (pm + u32::from(power::CONTROL_OFFSET)).into();
    fadt.pm1_cnt_len = 2;
    // No C2 and C3: latencies beyond what a kernel accepts.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.century = rtc::REGISTER_CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    let reset = u64::from(layout::PM_PORT + power::RESET_OFFSET);
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, reset);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

fn madt(vcpus: u8) -> Sdt {
    const PCAT_COMPAT: u32 = 1;
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, layout::LAPIC_START);
    madt.write_u32(40, PCAT_COMPAT);
    let mut entries = Vec::new();
    for vcpu in 0..vcpus {
        ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled).to_aml_bytes(&mut entries);
    }
    IoApic::new(0, layout::IOAPIC_START, 0).to_aml_bytes(&mut entries);
    // The system control interrupt is a level one: interrupt source override of ISA IRQ 9.
    let sci = layout::SCI_GSI.to_le_bytes();
    let flags = LEVEL_HIGH.to_le_bytes();
    entries.extend([2, 10, 0, sci[0], sci[0], sci[1], sci[2], sci[3], flags[0], flags[1]]);
    // LINT1 of every local APIC is the NMI.
    entries.extend([4, 6, 0xff, 0, 0, 1]);
    madt.append_slice(&entries);
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let offset = usize::try_from(address - layout::ACPI_START).unwrap();
        let length = u32::from_le_bytes(bytes[offset + 4..offset + 8].try_into().unwrap());
        &bytes[offset..offset + length as usize]
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn tables_are_linked_checksummed_and_fit_their_area() {
        for vcpus in 1..=8 {
            let AcpiTables { bytes } = tables(vcpus);
            assert!(layout::ACPI_START + (bytes.len() as u64) < layout::ACPI_END);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let xsdt = table(&bytes, u64_at(&bytes, 24));
            assert_eq!((&xsdt[..4], sum(xsdt)), (b"XSDT".as_slice(), 0));
            let mut names = Vec::new();
            for entry in xsdt[36..].chunks(8) {
                let table = table(&bytes, u64_at(entry, 0));
                assert_eq!(sum(table), 0);
                names.push(table[..4].to_vec());
                if &table[..4] == b"FACP" {
                    let dsdt = self::table(&bytes, u64_at(table, 140));
                    assert_eq!((&dsdt[..4], sum(dsdt)), (b"DSDT".as_slice(), 0));
                }
                if &table[..4] == b"APIC" {
                    assert_eq!(table.len(), 44 + 8 * usize::from(vcpus) + 12 + 10 + 6);
                }
            }
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        }
    }
}
